"""Classifier-free guidance: equal to guided epsilon written by hand, on every kind of network, with every sampler."""

from __future__ import annotations

import pytest
import torch

from samplers import EpsModel, guidance, list_samplers, sample, schedules

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = {s.name: s for s in list_samplers()}
LABELS = torch.tensor([0, 1, 2, 1])
NULL = {"class_labels": 3}
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batched", [True, False])
def test_every_sampler(classes, name, batched):
    guided = guidance.classifier_free(classes(VP), 2.5, NULL, batched=batched)

    def by_hand(x, t, class_labels):
        model = classes(VP)
        null = model.eps(x, t, class_labels=torch.full_like(class_labels, 3))
        return null + 2.5 * (model.eps(x, t, class_labels=class_labels) - null)

    where = {"rtol": 1e-2, "atol": 1e-2} if ALL[name].adaptive else {"steps": 6}
    given = {"x_T": X, "cond": {"class_labels": LABELS}, **where}
    expected = sample(EpsModel(by_hand, VP), name, **given)
    torch.testing.assert_close(sample(guided, name, **given), expected, rtol=1e-10, atol=1e-10)
    assert (expected - sample(classes(VP), name, **given)).abs().max() > 0.01
