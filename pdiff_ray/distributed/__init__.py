"""The Ray layer: runs the plain functions of `pdiff_ray.stages` on a cluster. Nothing else imports Ray."""
