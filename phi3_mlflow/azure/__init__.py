"""The road of a logged model to an Azure ML workspace: check, register, deploy.

Nothing here imports an Azure package before a workspace is really asked; the check needs none at all.
"""
