"""The rules, a small pure function per fault. Importing this package's modules fills `findings.RULES`."""
