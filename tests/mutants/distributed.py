"""Ways to join the factors of several processes that are wrong, one mistake each."""

from dataclasses import replace

from riemannian_modules.joining import Plan


class Unweighted(Plan):
    """Takes the mean of the ranks for the mean of the examples."""

    def __init__(self, offers):
        super().__init__([replace(offer, share=1.0 / len(offers)) for offer in offers])


class Linear(Plan):
    """Weighs rows by the share, not by its root."""

    def __init__(self, offers):
        super().__init__([replace(offer, share=offer.share**2) for offer in offers])


class Backwards(Plan):
    """Puts the ranks in another order than their residuals."""

    def joined(self, received):
        order = slice(None, None, -1)
        self._used, self._sent = self._used[order], self._sent[order]
        self._rows = {name: row[order] for name, row in self._rows.items()}
        return super().joined(received[order])


class Stale(Plan):
    """Sends the tensors of the forms although the rows were agreed on."""

    def packed(self, rank, factors, pieces, device):
        out = super().packed(rank, factors, pieces, device)
        if self._dense_names:
            out.zero_()
        return out


MUTANTS = {
    "unweighted": Unweighted,
    "linear": Linear,
    "backwards": Backwards,
    "stale": Stale,
}
