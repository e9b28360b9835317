"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, an image, a checkpoint, an option.

    The message is one line that says what is wrong and what to do about it. The command line prints it without a
    traceback and exits with a non-zero status; any other exception is a bug of ours and keeps its traceback.
    """
