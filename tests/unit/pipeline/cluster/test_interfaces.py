"""Choice of the network interface."""

import pytest

from pipeline.cluster import interfaces
from pipeline.cluster.interfaces import choose_interface, chosen_interface, interface_of


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test, whatever the test sets
        monkeypatch.delenv(name)


def variables() -> tuple[str | None, str | None]:
    import os

    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_gloo_and_nccl_get_the_interface_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "interface_of", lambda address: "ens5")
    choose_interface("10.0.0.2")
    assert variables() == ("ens5", "=ens5")


def test_nothing_is_chosen_for_nccl_on_one_machine_nor_for_an_unknown_address() -> None:
    choose_interface("203.0.113.7")
    assert variables() == (None, None)
    choose_interface("127.0.0.1")
    assert variables() == ("lo", None)


def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_interface("127.0.0.1")
    assert variables()[0] == chosen_interface("127.0.0.1") == "ib0"
