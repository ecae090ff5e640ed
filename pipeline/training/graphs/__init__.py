"""CUDA graphs of the passes of a step: captured for the most frequent canvases, replayed with one launch."""
