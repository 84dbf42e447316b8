"""Operations: one function each, specified by a readable NumPy implementation.

Every operation computes in float32 and rounds to the dtype of its input where Hugging Face's
implementation does, so that bfloat16 results agree with it as well as float32 ones. On the CPU weights are
held as float32 (already rounded to the model's dtype): NumPy has no fast 16-bit matrix product.
"""
