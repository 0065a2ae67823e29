"""Turn a spec into objects: data, models, teachers, the pipeline, the distiller. Nothing below reads a spec."""
