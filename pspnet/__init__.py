"""PSPNet (Zhao et al., CVPR 2017) in plain PyTorch: for one process or one DDP group. Never imports ray or mlflow."""
