"""Where a checkpoint's files are: on this machine, or on the Hugging Face Hub. huggingface_hub makes every request."""

from nla_engine.models.hub.fetch import tell
from nla_engine.models.hub.find import commit_of, find_directory, listed

__all__ = ["commit_of", "find_directory", "listed", "tell"]
