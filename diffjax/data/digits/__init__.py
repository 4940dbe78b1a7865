"""The handwritten digits that ship inside scikit-learn, as a tfds data set of ArrayRecord files.

1,797 grey images of 8 x 8 pixels with 17 levels, 0 ... 16, in ten classes of 174 to 183: the test
half of the UCI set, from 13 writers. They need no download, so they are the data of the demo.

The split is a rule of arithmetic, so that no generator or library version can change it: put the
images in the order of their class, images of one class in scikit-learn's order; every fifth,
starting with the first, is a test image. That makes 360 test and 1,437 training images, and every
class has a fifth of its images, give or take one, in the test split. Within a split the images keep
scikit-learn's order.

Reference: Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49.
"""
