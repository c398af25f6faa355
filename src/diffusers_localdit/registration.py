"""
Makes diffusers know the classes of this package, so that saved and hosted pipelines resolve to the installed code.

diffusers has no entry points for plugins: its tables are extended in place when the package is imported.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

import diffusers
import diffusers.pipelines
from diffusers.pipelines import pipeline_loading_utils

PACKAGE = __package__
METHODS = ["save_pretrained", "from_pretrained"]
AUTO_PIPELINE_MODULE = "diffusers.pipelines.auto_pipeline"


def register(model: type, text_to_image: type, image_to_image: type) -> None:
    """Registers the model and the two pipelines with everything in diffusers that loads by name."""
    for cls in (model, text_to_image, image_to_image):
        setattr(diffusers, cls.__name__, cls)
        setattr(diffusers.pipelines, cls.__name__, cls)
    # With the package found among its pipelines, the base DiffusionPipeline prefers the installed code to a `.py` file
    # of the repository.
    setattr(diffusers.pipelines, PACKAGE, sys.modules[PACKAGE])

    # `save_pretrained` writes the library of a component, `from_pretrained` imports it, only if it is listed here.
    for library in (PACKAGE, model.__module__):
        pipeline_loading_utils.LOADABLE_CLASSES[library] = {model.__name__: METHODS}
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[model.__name__] = METHODS

    if AUTO_PIPELINE_MODULE in sys.modules:
        register_auto_pipelines(sys.modules[AUTO_PIPELINE_MODULE], text_to_image, image_to_image)
    else:
        sys.meta_path.insert(0, AutoPipelineFinder(text_to_image, image_to_image))


def register_auto_pipelines(module: ModuleType, text_to_image: type, image_to_image: type) -> None:
    """Both tasks under one key, by which AutoPipeline finds one pipeline from the other."""
    module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["localdit"] = text_to_image
    module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["localdit"] = image_to_image


class AutoPipelineFinder(importlib.abc.MetaPathFinder):
    """Registers with the AutoPipelines when they are first imported, since importing them here would take seconds."""

    def __init__(self, text_to_image: type, image_to_image: type):
        self.pipelines = text_to_image, image_to_image

    def find_spec(self, fullname, path, target=None):
        if fullname != AUTO_PIPELINE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register_auto_pipelines(module, *self.pipelines)

        spec.loader.exec_module = exec_module
        return spec
