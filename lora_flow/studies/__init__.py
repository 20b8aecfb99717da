"""Named figures that are not sweeps of the flow: experiments with gradient descent and with pretraining."""

from lora_flow.studies.folder import begin_study as begin_study
from lora_flow.studies.folder import check_study_folder as check_study_folder
from lora_flow.studies.folder import load_study as load_study
from lora_flow.studies.folder import store_study as store_study
from lora_flow.studies.folder import study_of as study_of
from lora_flow.studies.table import STUDIES as STUDIES
from lora_flow.studies.table import Study as Study
