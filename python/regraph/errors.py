"""The one exception of this package: what rg_error says."""


class RegraphError(RuntimeError):
    """A call of the C library that failed, or one that was refused before it got there.

    status   stable name, such as "RG_E_SHAPE"
    file     file or "" ; `pointer` is a JSON pointer into it, `line` and `column` the place, 0
             where there is none
    node     node of the graph concerned, or ""
    message  one sentence: the offending value and what was expected
    others   what else is wrong with a spec: more of these
    """

    def __init__(self, status, message, *, file="", pointer="", node="", line=0, column=0,
                 text=None):
        super().__init__(text or f"{status}: {message}")
        self.status, self.message = status, message
        self.file, self.pointer, self.node = file, pointer, node
        self.line, self.column = line, column
        self.others = ()

    def with_others(self, others):
        """The same, which says in lines of its own what else is wrong."""
        error = RegraphError(self.status, self.message, file=self.file, pointer=self.pointer,
                             node=self.node, line=self.line, column=self.column,
                             text="\n".join(map(str, [self, *others])))
        error.others = tuple(others)
        return error

    def by_pointer(self):
        """The same without line and column: for what came as a dict, whose text nobody has seen."""
        text = str(self).split("\n")[0]
        text = text.replace(f"{self.file}:{self.line}:{self.column}: {self.pointer}",
                            f"{self.file}:{self.pointer}", 1)
        error = RegraphError(self.status, self.message, file=self.file, pointer=self.pointer,
                             node=self.node, text=text)
        return error.with_others([other.by_pointer() for other in self.others])
