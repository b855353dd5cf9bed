"""Muon: orthogonal updates for the LLM's matrices, AdamW's own for everything else."""

import copy

import pytest
import torch
from torch import nn

from llmga.muon import Muon, orthogonal, split_parameters
from llmga.stage1.model import is_in_llm_block


class Language(nn.Module):
    """Named as the LLM of a LLaVA model is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 24), nn.Linear(24, 8, bias=False)])
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        hidden = self.embed_tokens(ids)
        return self.norm(self.layers[1](torch.relu(self.layers[0](hidden)))) @ self.embed_tokens.weight.T


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"language_model": Language(), "multi_modal_projector": nn.Linear(8, 8)})


def muon(model, lr, matrix_lr):
    return Muon(model, is_in_llm_block, lr, matrix_lr, betas=(0.9, 0.999), weight_decay=0.0)


def take_step(model, optimizer):
    ids = torch.arange(11)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model["language_model"](ids), ids.roll(1))
    loss = loss + model["multi_modal_projector"](torch.ones(8)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 50, 20), (1, 32, 32)])
def test_updates_have_singular_values_near_one(shape):
    torch.manual_seed(1)
    singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert singular.min() > 0.3  # the smallest of a square matrix come last
    assert singular.median() > 0.65
    assert singular.max() < 1.25


def test_update_keeps_directions():
    torch.manual_seed(1)
    matrix = torch.randn(12, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    alike = nn.functional.cosine_similarity(orthogonal(matrix[None])[0].flatten(), (u @ v).flatten(), dim=0)
    assert alike > 0.97


def test_takes_only_the_blocks_matrices(model):
    matrices, others = split_parameters(model, is_in_llm_block)
    assert [tuple(matrix.shape) for matrix in matrices] == [(24, 8), (8, 24)]
    assert len(others) == len(list(model.parameters())) - 2


def test_frozen_parameters_are_left_out(model):
    model["language_model"].layers[0].weight.requires_grad_(False)
    matrices, others = split_parameters(model, is_in_llm_block)
    assert [tuple(matrix.shape) for matrix in matrices] == [(8, 24)]
    assert all(parameter.requires_grad for parameter in others)


def test_all_else_moves_as_under_adamw(model):
    twin = copy.deepcopy(model)
    take_step(model, muon(model, lr=1e-2, matrix_lr=1e-2))
    take_step(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "layers" in name and "weight" in name:
            assert not torch.allclose(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_step_of_a_matrix_is_as_large_as_told(model):
    before = model["language_model"].layers[0].weight.detach().clone()
    take_step(model, muon(model, lr=2e-5, matrix_lr=0.01))
    moved = model["language_model"].layers[0].weight.detach() - before
    assert 0.01 * 0.2 * 0.6 < moved.square().mean().sqrt() < 0.01 * 0.2 * 1.25


def test_gradients_are_still_there_after_a_step(model):
    take_step(model, muon(model, lr=2e-5, matrix_lr=0.01))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_learns_and_goes_on_from_saved_state(model):
    optimizer = muon(model, lr=1e-2, matrix_lr=3e-2)
    losses = [take_step(model, optimizer) for _ in range(10)]
    twin, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    other = muon(twin, lr=1e-2, matrix_lr=3e-2)
    other.load_state_dict(saved)
    on, again = [take_step(model, optimizer) for _ in range(30)], [take_step(twin, other) for _ in range(30)]
    assert on == again
    assert on[-1] < 0.5 * losses[0]


def test_a_convolution_is_a_matrix_with_a_row_for_each_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    before = model[1].weight.detach().clone()
    optimizer = Muon(model, lambda name: name.startswith("1."), lr=1e-3, matrix_lr=0.01, weight_decay=0.0)
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    moved = (before - model[1].weight.detach()) / (0.01 * 0.2 * 72**0.5)  # 8 inputs x 9 places
    singular = torch.linalg.svdvals(moved.flatten(1))
    assert singular.min() > 0.6 and singular.max() < 1.25
