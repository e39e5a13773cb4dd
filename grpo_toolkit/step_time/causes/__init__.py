"""Why a step is slow: rules without a clock, one table."""
