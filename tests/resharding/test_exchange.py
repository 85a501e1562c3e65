"""Rounds of the exchange route deliver every wanted element, one piece per device at a time."""

import numpy as np
from hypothesis import given
from sharding_changes import SIDE, move_of, shardings

from jaxshard.resharding.exchange import exchange_traffic, rounds, union
from jaxshard.resharding.geometry import device_boxes, traffic


@given(shardings(), shardings())
def test_each_round_has_at_most_one_piece_from_and_to_each_device(source, target):
    for one_round in rounds(move_of(source, target)):
        senders = [send.source for send in one_round.sends]
        receivers = [send.target for send in one_round.sends]
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)
        assert {send.box.shape for send in one_round.sends} == {one_round.shape}


@given(shardings(), shardings())
def test_rounds_deliver_each_wanted_element_once_from_a_device_that_holds_it(source, target):
    move = move_of(source, target)
    devices = union(move)
    held = device_boxes(source, move.shape)
    counts = {device: np.zeros((SIDE, SIDE), int) for device in devices}
    for one_round in rounds(move):
        for send in one_round.sends:
            assert held[devices[send.source]].contains(send.box)
            counts[devices[send.target]][send.box.slices] += 1
    for device, count in counts.items():
        wanted = np.zeros((SIDE, SIDE), int)
        if device in device_boxes(target, move.shape):
            wanted[device_boxes(target, move.shape)[device].slices] = 1
        assert np.array_equal(count, wanted)


@given(shardings(), shardings())
def test_an_exchange_delivers_as_many_bytes_as_transfers_in_one_process(source, target):
    move = move_of(source, target)
    found, plain = exchange_traffic(move), traffic(move)
    total = found.same_device_bytes + found.cross_device_bytes
    assert total == plain.same_device_bytes + plain.cross_device_bytes
