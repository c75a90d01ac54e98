"""What a fleet is put through: faults at named phases of an update, as data, and the processes that meet them."""
