"""How demonstrations are recorded in RLBench and policies evaluated: RLBench's way and the paper's.

Use:  protocol = choose_protocol(settings)     of collect_demos.py or evaluate.py

The paper's numbers are the commands in GENIMA's README and the defaults of its evaluation. There,
each evaluation episode also lays out the scene of a recorded demonstration again (--demos).
"""

from dataclasses import dataclass, fields, replace

from genima.files import UserError, check_number

# What the paper evaluates: 25 tasks of RLBench. It does not list them with its code; these are the
# 23 that the authors' laboratory configured for RLBench in its RoboBase library, and two others
# that GENIMA's code names. The paper's own table may list others.
PAPER_TASKS = tuple(
    "basketball_in_hoop insert_usb_in_computer lamp_on meat_on_grill open_door open_drawer "
    "open_microwave open_oven phone_on_base pick_up_cup press_switch put_books_on_bookshelf "
    "put_item_in_drawer put_money_in_safe put_rubbish_in_bin reach_target slide_block_to_target "
    "stack_wine sweep_to_dustpan take_lid_off_saucepan take_plate_off_colored_dish_rack "
    "toilet_seat_up turn_tap move_hanger open_box".split()
)
MAX_VARIATION = 9999
MAX_STEPS = 100_000
MAX_SPEED = 100.0  # rad/s and rad/s^2


@dataclass(frozen=True)
class Protocol:
    variation: int | None = None
    """Of every task; None: drawn in each episode."""
    image_size: tuple[int, int] = (128, 128)
    """Height and width of recorded images, pixels."""
    arm_velocity: float = 1.0
    """Of RLBench's planner, rad/s along the path in joint space; RLBench's default."""
    arm_acceleration: float = 4.0
    """Likewise, rad/s^2."""
    renderer: str = "opengl3"
    """CoppeliaSim's: opengl3 with shadows, opengl without."""
    execution_horizon: int = 8
    """Steps of each chunk that are executed before looking again."""
    max_steps: int = 200
    """Of an episode (paper)."""

    @property
    def variations(self) -> tuple[int, ...]:
        """The variations to choose from, none named: all."""
        if self.variation is None:
            return ()
        return (self.variation,)


RLBENCH_PROTOCOL = Protocol()
PAPER_PROTOCOL = Protocol(
    variation=0,
    image_size=(256, 256),
    arm_velocity=2.0,
    arm_acceleration=8.0,
    renderer="opengl",
    execution_horizon=20,
)


def choose_protocol(settings) -> Protocol:
    """The protocol of a stage's settings: the paper's or RLBench's, with what they set besides.

    Where the settings have no such field, or None or () in it, the protocol decides. Raises
    UserError for numbers that nothing can be done with.
    """
    protocol = RLBENCH_PROTOCOL
    if settings.protocol == "paper":
        protocol = PAPER_PROTOCOL
    for field in fields(Protocol):
        value = getattr(settings, field.name, None)
        if value not in (None, ()):
            protocol = replace(protocol, **{field.name: value})
    if protocol.variation is not None:
        check_number("--variation", protocol.variation, 0, MAX_VARIATION)
    check_number("--max-steps", protocol.max_steps, 1, MAX_STEPS)
    for field in ("arm_velocity", "arm_acceleration"):
        value = getattr(protocol, field)
        if not 0 < value <= MAX_SPEED:
            flag = field.replace("_", "-")
            raise UserError(f"--{flag} must be above 0, up to {MAX_SPEED}, not {value}.")
    return protocol


def recording_protocol(settings) -> Protocol:
    """How collect_demos.py records in RLBench: as above, of one of --variations if one is named."""
    protocol = choose_protocol(settings)
    if len(settings.variations) > 1:
        raise UserError("--sim rlbench records one of the --variations, or draws from all of them.")
    if settings.variations:
        check_number("--variations", settings.variations[0], 0, MAX_VARIATION)
        protocol = replace(protocol, variation=settings.variations[0])
    return protocol


def refuse_options(settings, names: tuple[str, ...]):
    """Raise a UserError if one of these options of RLBench is set where another simulator runs."""
    for name in names:
        if getattr(settings, name) not in (None, ()):
            raise UserError(f"--{name.replace('_', '-')} is for --sim rlbench.")
