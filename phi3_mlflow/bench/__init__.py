"""The verb `bench`: how fast a logged model answers on this machine."""
