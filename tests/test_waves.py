"""Random smooth fields: moments, wavelength, independence of the grid."""

import numpy as np

from datasets.waves import draw_waves, waves


def test_the_field_has_mean_zero_variance_one_and_its_wavelength():
    """Shapes scale it in mm; the mean squared slope of a field of variance 1 is its wavenumber squared."""
    rng = np.random.default_rng(0)
    drawn, step = draw_waves(rng, 200, wavelength=20.0), 0.01
    z, y, x = rng.uniform(-3000, 3000, (3, 20000))
    values = waves(drawn, z, y, x)
    assert abs(values.mean()) < 0.05 and abs(values.var() - 1) < 0.05
    slopes = [(waves(drawn, *np.add((z, y, x), step * axis[:, None])) - values) / step for axis in np.eye(3)]
    np.testing.assert_allclose(np.mean(np.square(slopes).sum(0)), (2 * np.pi / 20) ** 2, rtol=0.05)


def test_the_field_is_a_sum_of_waves_of_the_points_alone():
    """Two series of one head, on grids of their own, must show the same folds; against a loop."""
    vectors, phases = drawn = draw_waves(np.random.default_rng(1), 5, 15.0)
    z, y, x = np.random.default_rng(2).normal(0, 30, (3, 4)).astype(np.float32)
    naive = [sum(np.cos(vector @ point + phase) for vector, phase in zip(vectors, phases, strict=True))
             * np.sqrt(2 / 5) for point in np.stack([z, y, x], 1)]
    np.testing.assert_allclose(waves(drawn, z, y, x), naive, atol=1e-4)
    assert waves(drawn, z, y, x).dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 2 * np.pi / 15)
