"""Law 2, released."""


def test_x(store):
    pass
