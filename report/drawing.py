"""The drawing of the README: how five methods cut one MLP. Text in, SVG out, no library.

    python -m report.drawing            # writes report/methods.svg, the same bytes each time

Each panel has the MLP in grey, its input x below and its output y above. In colour stands what a
method puts there: what it reads (blue), what it writes (red), which of its units are on (orange).
The colours are legible on white and on black; the words change with the reader's colour scheme.
"""
from pathlib import Path

OUT = Path(__file__).with_name("methods.svg")
PANEL = 200                     # width of a panel
HEIGHT = 360
STYLE = """
    text { font: 13px sans-serif; fill: #24292f }
    .name { font-weight: bold; font-size: 15px }
    .small { font-size: 11.5px }
    .off, .wire { fill: none; stroke: #8b949e; stroke-width: 1.5 }
    .read { fill: none; stroke: #1f77b4; stroke-width: 2.5 }
    .write { fill: none; stroke: #d62728; stroke-width: 2.5 }
    .on { fill: #e69f00; stroke: none }
    .part { fill: #e69f00; fill-opacity: .25; stroke: #e69f00; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
"""
HEADS = {"wire": "#8b949e", "read": "#1f77b4", "write": "#d62728"}
MARKER = ('<marker id="{kind}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" '
          'markerHeight="5" orient="auto"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>')


class Panel:
    """One method's part of the drawing. x is measured from the left edge of the panel."""
    def __init__(self, left):
        self.left = left
        self.parts = []

    def text(self, x, y, words, kind="", anchor="middle"):
        self.parts.append(f'<text x="{self.left + x}" y="{y}" class="{kind}" '
                          f'text-anchor="{anchor}">{words}</text>')

    def arrow(self, kind, *points):
        path = " L".join(f"{self.left + x} {y}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="{kind}" marker-end="url(#{kind})"/>')

    def box(self, x, y, width, height, kind="off"):
        self.parts.append(f'<rect x="{self.left + x}" y="{y}" width="{width}" '
                          f'height="{height}" rx="3" class="{kind}"/>')

    def dot(self, x, y, kind):
        self.parts.append(f'<circle cx="{self.left + x}" cy="{y}" r="4.5" class="{kind}"/>')

    def dots(self, x, y):
        """Five units, of which two are on."""
        for i, kind in enumerate(("off", "on", "off", "off", "on")):
            self.dot(x + 14 * i, y, kind)

    def wires(self):
        """The way from x to y, without the matrices."""
        self.text(55, 306, "x")
        self.arrow("wire", (55, 290), (55, 262))
        self.arrow("wire", (55, 222), (55, 200))
        self.text(55, 194, "gelu", "small")
        self.arrow("wire", (55, 180), (55, 162))
        self.arrow("wire", (55, 122), (55, 86))
        self.text(55, 78, "y")

    def mlp(self):
        self.wires()
        self.box(20, 222, 70, 40)
        self.text(55, 247, "W_in")
        self.box(20, 122, 70, 40)
        self.text(55, 147, "W_out")


def sae(panel):
    panel.mlp()
    panel.arrow("read", (62, 104), (118, 104))
    panel.dots(108, 118)
    panel.arrow("write", (136, 104), (136, 74), (68, 74))


def transcoder(panel):
    panel.mlp()
    panel.arrow("read", (62, 276), (136, 276), (136, 206))
    panel.dots(108, 194)
    panel.arrow("write", (136, 182), (136, 74), (68, 74))


def clt(panel):
    transcoder(panel)
    panel.arrow("write", (150, 182), (150, 52))
    panel.text(150, 46, "later MLPs", "small")


def molt(panel):
    panel.mlp()
    panel.arrow("read", (62, 276), (141, 276), (141, 242))
    for x, gate, kind in ((117, "on", "part"), (141, "off", "off"), (165, "on", "part")):
        panel.dot(x, 230, gate)
        panel.box(x - 9, 172, 18, 44, kind)
    panel.arrow("write", (141, 170), (141, 74), (68, 74))


def spd(panel):
    panel.wires()
    for name, y, on in (("W_in", 224, (1, 4)), ("W_out", 124, (0, 3))):
        for i in range(6):
            panel.box(20 + 12 * i, y, 10, 36, "part" if i in on else "off")
        panel.text(98, y + 23, name, anchor="start")
    panel.arrow("read", (62, 276), (160, 276), (160, 206))
    panel.text(150, 196, "importance", "small")
    panel.arrow("wire", (150, 182), (140, 164))
    panel.arrow("wire", (150, 200), (140, 230))


PANELS = (("SAE", sae, "reads y, writes y:", "few of many directions"),
          ("transcoder", transcoder, "reads x, writes y:", "few of many directions"),
          ("cross-layer transcoder", clt, "reads x, writes y here", "and in all later MLPs"),
          ("MOLT", molt, "few of many maps", "of low rank, gated by x"),
          ("SPD", spd, "few of many rank-one", "pieces of the weights"))


def draw():
    """The whole drawing as SVG."""
    markers = [MARKER.format(kind=kind, color=color) for kind, color in HEADS.items()]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" '
             f'viewBox="0 0 {PANEL * len(PANELS)} {HEIGHT}" role="img">',
             "<title>What five methods read, write and switch on of one MLP</title>",
             f"<style>{STYLE}</style>", "<defs>", *markers, "</defs>"]
    for i, (name, fill, *words) in enumerate(PANELS):
        panel = Panel(PANEL * i + 10)
        panel.text(80, 22, name, "name")
        fill(panel)
        for j, line in enumerate(words):
            panel.text(80, 330 + 16 * j, line, "small")
        parts += panel.parts
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"-> {OUT}")
