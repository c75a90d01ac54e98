"""Text in and out, where the checkpoint has a tokenizer.json and the tokenizers package is there."""

from pathlib import Path
from typing import Any

try:
    from tokenizers import Tokenizer

    INSTALLED = True
except ImportError:  # the extra "text" is not installed
    INSTALLED = False

TOKENIZER_FILE = "tokenizer.json"


class Text:
    """A checkpoint's text, if it has any."""

    def __init__(self, folder: Path | str) -> None:
        """ValueError if the tokenizer is there and broken."""
        self._path = Path(folder) / TOKENIZER_FILE
        self._tokenizer: Any = None
        if INSTALLED and self._path.exists():
            try:
                self._tokenizer = Tokenizer.from_file(str(self._path))
            except Exception as error:  # the binding raises nothing more special
                raise ValueError(f"{self._path}: is no tokenizer: {error}") from error

    @property
    def there(self) -> bool:
        """Whether texts can be read and written."""
        return self._tokenizer is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids, with the special tokens that the tokenizer adds. ValueError where texts cannot be read."""
        if self._tokenizer is None:
            raise ValueError(f"a text cannot be read: {self._lack()}; give token ids instead, --tokens 1,2,3")
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _lack(self) -> str:
        if not self._path.exists():
            return f"{self._path.parent} has no {TOKENIZER_FILE}"
        return "the package tokenizers is not installed (pip install 'moe-rollout[text]')"
