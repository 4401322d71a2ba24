"""What trainers need to be there at all."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture
def sequential(monkeypatch):
    """Rows in the order in which they are given."""
    import transformers
    from torch.utils.data import SequentialSampler

    monkeypatch.setattr(
        transformers.Trainer,
        "_get_train_sampler",
        lambda self, data=None: SequentialSampler(data or self.train_dataset),
    )
