"""Models whose weights are spread over ranks: gathering them, and agreeing between ranks."""
