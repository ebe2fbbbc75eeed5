"""A small encoder of torch.nn with 4 bits, its embedding tied to its head.

Prepare, calibrate, train, compile, save; then restore in a fresh process and convert:
    python examples/transformer.py transformer.pt && python examples/transformer.py transformer.pt --restore
"""

import argparse

import torch
from torch import nn

import qbr

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("path", help="the checkpoint: written, or read with --restore")
parser.add_argument("--restore", action="store_true", help="load it, convert, and compare the outputs")
options = parser.parse_args()
torch.manual_seed(0)
batches = [(torch.randint(1, 100, (4, 12)), torch.randint(100, (4,))) for _ in range(5)]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32, padding_idx=0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)  # with F.relu
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0).mean(1))


model = Encoder()

if not options.restore:
    config = qbr.QATConfig(weight_bits=4, act_bits=4, quantize_inputs=True)
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
