"""Which requests of a connection are owed an answer once the daemon drains: those whose first byte came before."""


class Drain:
    """Before `begin` every request is owed one.

    At that moment some bytes may wait in the kernel, unread. A request that begins within them, or that is being read,
    is owed an answer; one that begins later is not.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.owed_bytes = 0
        self.owes_present = (
            True  # the request whose head is being read, or has just been read, is owed an answer
        )

    def begin(self, unread_bytes: int, *, is_reading_one: bool) -> None:
        """Draw the line here. `is_reading_one` where a part of a request has been read."""
        self.has_begun = True
        self.owed_bytes = unread_bytes
        self.owes_present = is_reading_one

    def read(self, size_bytes: int, *, is_between: bool) -> None:
        """Note, once it has begun, that bytes were read; `is_between` where the last request before them is complete."""
        if is_between:
            self.owes_present = self.owed_bytes > 0
        self.owed_bytes = max(0, self.owed_bytes - size_bytes)

    @property
    def owes_more(self) -> bool:
        """Whether requests may yet come that are owed an answer."""
        return not self.has_begun or self.owed_bytes > 0

    def forgive(self) -> None:
        """Owe nothing more."""
        self.has_begun = True
        self.owed_bytes = 0
