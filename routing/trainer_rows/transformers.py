"""transformers 5.17: the routers of its mixture-of-experts families, eager."""

from routing.trainer_row import Trainer
from routing.trainer_rows.transformers_refused import REFUSED
from routing.trainer_rows.transformers_shared import SHARED
from routing.trainer_rows.transformers_single import SINGLE

TRANSFORMERS = Trainer(
    name="transformers",
    description="the eager modules of transformers 5.17, also under FSDP as long as nothing patches or compiles them",
    rows=(*SHARED, *SINGLE),
    refusals=REFUSED,
)
