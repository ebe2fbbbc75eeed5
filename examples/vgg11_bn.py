"""torchvision's VGG-11 with 2 bits, 4 for the classifier's weights; its first convolution stays in float.

Prepare, calibrate, train, compile, save; then restore in a fresh process and convert:
    python examples/vgg11_bn.py vgg11_bn.pt && python examples/vgg11_bn.py vgg11_bn.pt --restore
"""

import argparse

import torch
from torch import nn
from torchvision.models import vgg11_bn

import qbr

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("path", help="the checkpoint: written, or read with --restore")
parser.add_argument("--restore", action="store_true", help="load it, convert, and compare the outputs")
options = parser.parse_args()
torch.manual_seed(0)
batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(5)]
model = vgg11_bn(num_classes=10)

if not options.restore:
    config = qbr.QATConfig(weight_bits=2, act_bits=2, skip=["features.0"], overrides={"classifier": {"weight_bits": 4}})
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
