"""Data."""
from .augment import augment
from .splits import holdout, split_clean, stratified
def load_data(path):
    import numpy as np, torch
    from ..types import ImageSet
    file,_,split=path.rpartition(":")
    with np.load(file) as d: x,y=d[f"{split}_x"],d[f"{split}_y"]
    return ImageSet(torch.from_numpy(x).permute(0,3,1,2).contiguous(),torch.from_numpy(y.astype("int64")),tuple(str(i) for i in range(int(y.max())+1)),f"cifar10:{split}")
