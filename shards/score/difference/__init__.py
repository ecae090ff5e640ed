"""Differences of two models on the same images, with intervals from images drawn again (paired bootstrap).

The images of a data set are one draw of many that it could have been. Both models are scored again and again on images
drawn from it with replacement, the same ones for both, so an image that is hard for both weighs on neither.
"""

from shards.score.difference.boxes import FIGURES as FIGURES
from shards.score.difference.boxes import difference as difference
from shards.score.difference.changes import DRAWS as DRAWS
from shards.score.difference.changes import LEAST_IMAGES as LEAST_IMAGES
from shards.score.difference.changes import Change as Change
from shards.score.difference.changes import Difference as Difference
from shards.score.difference.changes import interval_of_recipes as interval_of_recipes
from shards.score.difference.changes import spread as spread
from shards.score.difference.segments import segment_difference as segment_difference
