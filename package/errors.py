"""Errors that a user can act on: each message says what is wrong, where, and what to do."""


class RelayError(Exception):
    """Base of every error that relay_attention raises for its user."""


class ArtifactError(RelayError):
    """An artifact folder is missing, damaged, of another version, or does not fit what is asked of it."""


class ExportError(RelayError):
    """A model cannot be exported: its files, its attention form, or its system prompt."""


class PromptError(RelayError):
    """A request cannot be run: empty, too long, or with token ids out of range."""


class BackendError(RelayError):
    """An inference engine, its plugin library, or its device is missing or refused the model."""
