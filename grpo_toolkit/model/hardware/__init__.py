"""The machine and the model in numbers: environment, data sheets, sizes."""
