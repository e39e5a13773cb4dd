"""Shards of trainers that an export reads itself: verl's family, and FSDP's sharded state dicts."""
