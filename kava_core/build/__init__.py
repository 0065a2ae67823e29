"""Turn a spec into objects: data, models, teachers, pipeline, distiller. Nothing below reads a spec."""
