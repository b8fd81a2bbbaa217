"""What the device's door adds to Numba's simulator."""

import threading

from nblora.backends.device import OneMaker


def test_two_threads_get_one_shared_array():
    arrays, got = OneMaker(), []
    assert arrays.get("line 1") is None
    other = threading.Thread(target=lambda: got.append(arrays.get("line 1")), daemon=True)
    other.start()
    other.join(0.05)
    assert other.is_alive()  # it waits for the array that this thread makes
    arrays["line 1"] = "array"
    other.join(5)
    assert got == ["array"]
    assert arrays.get("line 1") == "array"
