"""The version of FlashInfer whose interface this is."""

__version__ = "0.7.2.post1"
__git_commit__ = __git_version__ = "unknown"
