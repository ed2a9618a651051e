"""What both stages share: the store format, durable files, configuration. Imports neither stage, and no torch."""
