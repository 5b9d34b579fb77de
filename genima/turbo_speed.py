"""Painting with SD-Turbo at the GPU's speed: one picture is one CUDA graph.

    instruction --> text, encoded once, kept on the GPU --+
    seed ---------> noise, kept on the GPU ---------------+--> [ ControlNet, UNet, VAE ] --> picture
    tiled views --> copied to the GPU --------------------+          one CUDA graph

One picture of 512x512 is about 4 TFLOP: some 6 ms of arithmetic on a large GPU, in thousands of
operations. Started one by one from Python they take many times as long. A CUDA graph is a list of
operations, recorded once; the GPU then runs all of them without Python. Before it is recorded,
PyTorch may compile the networks: fewer operations, which read and write memory less often.

    painter = load_painter(folder, "cuda")
    print(speed_up(painter))  # from now on painter.paint and paint_tiled use the graph

A graph is of one shape: a single picture of the painter's resolution. A batch is painted picture by
picture; another resolution is painted without it. Weights and device must not change afterwards.
Without a CUDA GPU nothing is recorded, and the same operations run one by one.

Method: CUDA Graphs (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

import torch
from torch import Tensor
from tqdm import tqdm

from genima.diffusion import VAE_PATCH, initial_latents
from genima.views import grid_of

WARM_UP = 3  # passes before recording: PyTorch compiles, cuDNN chooses its algorithms


def speed_up(painter, compiled: bool = True) -> str:
    """Let a TurboPainter paint by a CUDA graph where there is one. Returns what was done.

    compiled: let PyTorch write kernels for this device, too. The first time this takes a minute or
    two; PyTorch keeps them on disk for the next time.
    """
    on_gpu = painter.unet.device.type == "cuda"
    if on_gpu:
        painter.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    if compiled:
        compile_networks(painter)
    painter.paint_tiled = GraphPainting(painter)
    if on_gpu:
        return "The painter is one CUDA graph."
    return "There is no CUDA GPU, so the painter runs operation by operation, without a CUDA graph."


def compile_networks(painter):
    """Let PyTorch write kernels for this device when each network is first called."""
    for network in (painter.unet, painter.controlnet, painter.vae.decoder):
        network.compile(dynamic=False)  # kernels for one shape are faster than for all


def compile_for_training(painter) -> str:
    """The same for the networks that gradients flow through. Returns what was done."""
    if painter.unet.device.type != "cuda":
        return "There is no CUDA GPU, so nothing is compiled."
    for network in (painter.unet, painter.controlnet):
        network.compile(dynamic=False)
    return "The first step and the first validation compile the networks: minutes each."


def record(function, passes: int = WARM_UP):
    """A CUDA graph of function(), and its result: a tensor that every replay writes again.

    function must read nothing but tensors that stay where they are, and wait for nothing.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # it tries its algorithms; the graph keeps the best
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in tqdm(range(passes), "preparing the painter for this GPU", leave=False):
            function()
            torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    torch.backends.cudnn.benchmark = before
    return graph, result


class GraphPainting:
    """TurboPainter.paint_tiled, with the same arguments and the same pictures."""

    @torch.no_grad()
    def __init__(self, painter):
        self.painter = painter
        self.painted_eagerly = type(painter).paint_tiled  # for other resolutions
        unet = painter.unet
        rows, columns = grid_of(len(painter.config["cameras"]))
        H = painter.config["resolution"]
        W = H * columns // rows
        painter.scheduler.set_timesteps(painter.config["num_inference_steps"])
        self.timesteps = painter.scheduler.timesteps.to(unet.device)
        self.sigmas = painter.scheduler.sigmas.tolist()  # one more: the last is 0

        # The graph's inputs. They stay where they are; each picture writes new values into them.
        self.condition = torch.zeros(1, 3, H, W, device=unet.device, dtype=unet.dtype)
        self.condition = self.condition.contiguous(memory_format=torch.channels_last)
        latent_shape = (1, unet.config.in_channels, H // VAE_PATCH, W // VAE_PATCH)
        self.noise = torch.zeros(latent_shape, device=unet.device)
        self.seed = None  # of the noise in it
        self.texts = {}  # prompt: its encoder_hidden_states (1, L, E), on the device
        width = unet.config.cross_attention_dim
        self.text = torch.zeros(1, 77, width, device=unet.device, dtype=unet.dtype)

        self.graph = None
        if unet.device.type == "cuda":
            self.graph, self.painted = record(self.paint_inputs)

    def paint_inputs(self) -> Tensor:
        """The picture (1, 3, H, W), 0..1, of the inputs. These operations are recorded."""
        return self.painter.decode_latents(self.denoise_inputs())

    def denoise_inputs(self) -> Tensor:
        """The latents (1, 4, h, w) at the end of Euler's steps, as EulerDiscreteScheduler's."""
        latents = self.noise
        for i, timestep in enumerate(self.timesteps):
            sigma, next_sigma = self.sigmas[i : i + 2]
            noisy = latents / (sigma**2 + 1) ** 0.5
            noise = self.painter.predict_noise(self.condition, self.text, noisy, timestep)
            latents = latents + (next_sigma - sigma) * noise.float()
        return latents

    def write_inputs(self, condition: Tensor, prompt: str, seed: int):
        """Put one picture's condition (1, 3, H, W), text and noise where the graph reads them."""
        if prompt not in self.texts:
            self.texts[prompt], _ = self.painter.encode_text([prompt])
        if seed != self.seed:
            shape = self.noise.shape
            scheduler = self.painter.scheduler
            self.noise.copy_(initial_latents(scheduler, shape, seed, self.noise.device))
            self.seed = seed
        self.text.copy_(self.texts[prompt])
        self.condition.copy_(condition)

    @torch.no_grad()
    def __call__(self, condition: Tensor, prompts: list[str], seed: int = 0) -> Tensor:
        """Tiled views (B, 3, H, W), 0..1 -> the same with spheres; nothing waits for the GPU."""
        if condition.shape[1:] != self.condition.shape[1:]:
            return self.painted_eagerly(self.painter, condition, prompts, seed)
        pictures = []
        for i, prompt in enumerate(prompts):
            self.write_inputs(condition[i : i + 1], prompt, seed)
            if self.graph is None:
                pictures.append(self.paint_inputs())
            else:
                self.graph.replay()
                pictures.append(self.painted.clone())  # the next picture is written over it
        return torch.cat(pictures)
