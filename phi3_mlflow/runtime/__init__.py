"""The floor that travels with every logged model. It imports nothing from the toolkit above it."""

# Version of what a logged model holds: its files, its model_config and how the runtime reads them.
FORMAT = 1
