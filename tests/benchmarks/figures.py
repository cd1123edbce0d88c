"""Figures: SVG on white, so that they are legible in GitHub's light and dark mode; as a script, a GIF of a video.

Called so:

    python tests/benchmarks/figures.py runs/NAME/videos/best/rl-video-episode-0.mp4 agent.gif      # or its last 20
    python tests/benchmarks/figures.py runs/NAME/videos/best/rl-video-episode-0.mp4 agent.gif 20   # seconds
"""

import contextlib
import math
import sys

import matplotlib.pyplot as plt
import sweep

plt.switch_backend("agg")
plt.rcParams |= {"svg.hashsalt": "dqn", "axes.titlesize": 10}  # with the salt the same data give the same file


@contextlib.contextmanager
def panels(name, titles, columns=2, height=2.5, **settings):
    """Yield axes with these titles and settings, in rows, and save them as SVG with one legend below all."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    drawing, grid = plt.subplots(rows, columns, figsize=(8.5, height * rows + 0.6), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for place, title in zip(axes, titles, strict=False):
        place.set(title=title, **settings)
        place.grid(alpha=0.3)
    for place in axes[len(titles):]:
        place.axis("off")
    yield axes[: len(titles)]
    named = {label: line for place in axes for line, label in zip(*place.get_legend_handles_labels(), strict=True)}
    drawing.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False)
    drawing.savefig(sweep.RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(drawing)


def gif(video, path, seconds=math.inf, width=400, fps=25, colours=64):
    """Write the last seconds of a video as a GIF that is small enough for a page."""
    from moviepy import VideoFileClip
    from PIL import Image

    with VideoFileClip(video) as clip:
        end = clip.subclipped(max(clip.duration - float(seconds), 0))
        frames = [Image.fromarray(frame) for frame in end.iter_frames(fps=fps)]
    width = min(width, frames[0].width)
    height = width * frames[0].height // frames[0].width
    frames = [frame.resize((width, height)) for frame in frames]
    palette = frames[len(frames) // 2].quantize(colours)  # one for all, so that what stands still costs nothing
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0, optimize=True)


if __name__ == "__main__":
    gif(*sys.argv[1:])
