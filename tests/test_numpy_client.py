"""What `NumPyClient`s send, in the form of other apps: names by place, one MetricRecord."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from torch import nn

from fl_wb.federation.model import Model
from fl_wb.messages import generator_part, numpy_client
from fl_wb.messages.records import InvalidUpload, validate
from fl_wb.strategies import RoleFedAvg
from fl_wb.testing.in_process_grid import InProcessGrid


def undeclared(values: np.ndarray) -> Array:
    stream = io.BytesIO()
    np.save(stream, values)
    return Array(dtype="", shape=(), stype="numpy.ndarray", data=stream.getvalue())


def as_list(*values: np.ndarray) -> ArrayRecord:
    return ArrayRecord({str(place): undeclared(value) for place, value in enumerate(values)})


def test_a_list_gets_names_in_order_and_names_stay() -> None:
    sent = as_list(np.zeros(1), np.ones(1))
    assert list(numpy_client.named(sent, ["w", "b"])) == ["w", "b"]
    named = ArrayRecord({"b": sent["0"], "w": sent["1"]})
    assert numpy_client.named(named, ["w", "b"]) is named
    # Of a ParameterList the names are numbers, whatever their order:
    turned = ArrayRecord({"1": sent["1"], "0": sent["0"]})
    assert numpy_client.named(turned, ["0", "1"]) is turned


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidUpload, match=r"^its list has 1 arrays, and the model has 2$"):
        numpy_client.named(as_list(np.zeros(1)), ["w", "b"])


def test_arrays_that_declare_nothing_are_still_held_to_the_template() -> None:
    template = {"w": torch.zeros(2, 3)}
    good = np.arange(6, dtype=np.float64).reshape(2, 3)
    found = validate(ArrayRecord({"w": undeclared(good)}), template)
    assert torch.equal(found["w"], torch.arange(6.0).reshape(2, 3))
    for bad, why in ((good.T, r"holds \(3, 2\)"), (good.astype(int), "instead of float32")):
        with pytest.raises(InvalidUpload, match=why):
            validate(ArrayRecord({"w": undeclared(bad)}), template)


@pytest.mark.parametrize("positional", [False, True])
def test_a_slice_of_the_list_is_the_generators(positional: bool) -> None:
    # Prepare: a list of another network's array and then the generator's
    network = nn.Linear(2, 3)
    own = network.state_dict()
    names = ["0", "1", "2"] if positional else ["d.w", "g.weight", "g.bias"]
    values = [torch.full((4,), 5.0), own["weight"], own["bias"]]
    initial = ArrayRecord(dict(zip(names, values, strict=True)))
    model = Model(initial, network, slice(1, None), None)

    # Execute
    state = model.read(as_list(*(value.numpy() + 1 for value in values)))
    generator = model.generator(state)
    whole = model.whole(generator, {names[0]: state[names[0]]})

    # Assert
    assert list(generator) == ["weight", "bias"]
    assert torch.equal(generator["weight"], own["weight"] + 1)
    assert list(whole) == names
    for got, value in zip(whole.to_numpy_ndarrays(), values, strict=True):
        assert np.array_equal(got, value.numpy() + 1)


def test_a_slice_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the slice has none of the 1 arrays"):
        generator_part.split(as_list(np.zeros(1)), slice(3, 5))


def reply(code: int) -> RecordDict:
    return RecordDict(
        {
            "evaluateres.loss": MetricRecord({"loss": 0.5}),
            "evaluateres.num_examples": MetricRecord({"num_examples": 7}),
            "evaluateres.metrics": ConfigRecord({"acc": 0.9, "name": "x", "good": True}),
            "evaluateres.status": ConfigRecord({"code": code, "message": "no method"}),
        }
    )


def test_a_reply_has_one_metric_record() -> None:
    (figures,) = numpy_client.plain(reply(0)).metric_records.values()
    assert dict(figures) == {"acc": 0.9, "loss": 0.5, "num_examples": 7}
    other = RecordDict({"metrics": MetricRecord({"a": 1})})
    assert numpy_client.plain(other) is other


def test_a_status_of_failure_is_the_reason() -> None:
    with pytest.raises(InvalidUpload, match=r"^its client says: 'no method'$"):
        numpy_client.plain(reply(5))


def test_evaluation_has_keys_of_its_own() -> None:
    assert numpy_client.evaluation_key("fitins.parameters") == "evaluateins.parameters"
    assert numpy_client.evaluation_key("arrays") == "arrays"


class AddsItsNumber(NumPyClient):
    """Adds its partition's number to every array; it has no `evaluate`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        return [values + self.number for values in parameters], 1 + self.number, {}


def test_clients_without_evaluate_are_averaged_and_said(caplog: pytest.LogCaptureFixture) -> None:
    # Prepare
    def client_fn(context: Context) -> Client:
        return AddsItsNumber(int(context.node_config["partition-id"])).to_client()

    strategy = RoleFedAvg(
        weighted_by_key="num_examples",
        arrayrecord_key="fitins.parameters",
        configrecord_key="fitins.config",
    )
    initial = ArrayRecord({"w": torch.zeros(2, 3), "b": torch.ones(3)})

    # Execute
    result = strategy.start(InProcessGrid(ClientApp(client_fn), nodes=2), initial, num_rounds=1)

    # Assert: the mean of 0 and 1, weighted 1 and 2
    found = result.arrays.to_torch_state_dict()
    assert torch.allclose(found["w"], torch.full((2, 3), 2 / 3))
    assert torch.allclose(found["b"], torch.full((3,), 1 + 2 / 3))
    assert caplog.text.count("its client says: 'Client does not implement `evaluate`'") == 2
    assert not result.evaluate_metrics_clientapp.get(1)


def test_how_often_a_client_has_each_label_arrives() -> None:
    said = reply(0)
    said["evaluateres.metrics"] = ConfigRecord({"label-counts": [3.0, 0.0, 2.5], "note": "x"})
    (figures,) = numpy_client.plain(said).metric_records.values()
    assert figures["label-counts"] == [3.0, 0.0, 2.5]
    assert "note" not in figures
    said["evaluateres.metrics"] = ConfigRecord({"label-counts": ["3", "0"]})
    with pytest.raises(InvalidUpload, match=r"label-counts .* are not all numbers"):
        numpy_client.plain(said)
