"""The training frameworks, one file each; each is imported only by whoever uses the framework."""
