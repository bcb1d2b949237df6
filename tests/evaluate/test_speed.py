from thesislib.compress.gptq import Rtn
from thesislib.evaluate.speed import speeds
from thesislib.formats.sizes import sizes


def test_bytes_are_those_held_and_rates_are_rates(tiny):
    subject = tiny()
    small, _ = Rtn(group=16).apply(subject)
    table = speeds({"dense": subject, "4 bits": small}, tokens=8, repeats=1)
    assert list(table.index) == ["dense", "4 bits"] and (table > 0).all().all()
    assert table["MB in memory"].tolist() == [round(sizes(m)["bytes_in_memory"] / 1e6, 1) for m in (subject, small)]
