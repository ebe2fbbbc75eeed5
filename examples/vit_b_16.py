"""torchvision's ViT-B/16 with 4 bits: no ReLU in it, so what is quantized is the inputs of layers.

Prepare, calibrate, train, compile, save; then restore in a fresh process and convert:
    python examples/vit_b_16.py vit_b_16.pt && python examples/vit_b_16.py vit_b_16.pt --restore
"""

import argparse

import torch
from torch import nn
from torchvision.models import vit_b_16

import qbr

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("path", help="the checkpoint: written, or read with --restore")
parser.add_argument("--restore", action="store_true", help="load it, convert, and compare the outputs")
options = parser.parse_args()
torch.manual_seed(0)
batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(5)]
model = vit_b_16(num_classes=10, image_size=32)
nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision has 0 there: no data for a step

if not options.restore:
    config = qbr.QATConfig(weight_bits=4, act_bits=4, quantize_inputs=True, first_layer=8, last_layer=8)
    print(qbr.plan(model, config))
    qbr.prepare(model, config)
    qbr.calibrate(model, batches[:2])
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=1e-4))
    compiled = torch.compile(model, fullgraph=True)
    for x, y in batches:
        loss = nn.functional.cross_entropy(compiled(x), y)
        br = qbr.bin_loss(model)
        (loss + br.weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs = model.eval()(batches[0][0])
    torch.save({"config": config.to_json(), "model": model.state_dict(), "outputs": outputs}, options.path)
else:
    saved = torch.load(options.path, weights_only=True)
    qbr.prepare(model, qbr.QATConfig.from_json(saved["config"])).load_state_dict(saved["model"])
    plain = qbr.convert(model.eval())
    with torch.no_grad():
        assert torch.equal(model(batches[0][0]), saved["outputs"])
        assert torch.equal(plain(batches[0][0]), saved["outputs"])
    print("restored and converted: the same outputs")
