"""The four Ray actors, installed as `pipo_ray.actors`."""
