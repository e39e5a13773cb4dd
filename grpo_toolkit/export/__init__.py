"""A trained model published as a folder, verified before anybody sees it."""
