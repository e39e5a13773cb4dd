"""The search for the settings that answer fastest."""
