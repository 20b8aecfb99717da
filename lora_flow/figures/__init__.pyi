from .maps import phase_diagram as phase_diagram
from .maps import plot_map as plot_map
from .over_time import panels as panels
from .over_time import plot_alignment as plot_alignment
from .over_time import plot_distance as plot_distance
from .over_time import plot_loss as plot_loss
from .over_time import plot_phases as plot_phases
from .over_time import three_panels as three_panels
