"""An adapter merged into its base: adapter + base -> plan -> stream of rows -> published."""
