"""A model's directory: its configuration, its tokenizer, and its tensors as the model's parameters.

Nothing of a directory is ever executed: no ``auto_map``, no pickled weights.

Public modules, which other rooms import::

    conversion.py    Makes a model's parameters from the tensors of its checkpoint, whole or for some experts only
    files.py         Finds the directory of a model, and loads its tokenizer; does not import the model itself
    model_config.py  Reads config.json, and refuses what cannot be served with a word on what could
    reader.py        Reads safetensors files tensor by tensor and row by row, counting the bytes

Private to this room::

    quantization.py  Dequantises fp8 and MXFP4 checkpoints through transformers' own quantisers
"""
