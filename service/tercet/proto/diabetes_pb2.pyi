# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AssessRequest(_message.Message):
    __slots__ = ("patients",)
    PATIENTS_FIELD_NUMBER: _ClassVar[int]
    patients: _containers.RepeatedCompositeFieldContainer[Patient]
    def __init__(self, patients: _Optional[_Iterable[_Union[Patient, _Mapping]]] = ...) -> None: ...

class Patient(_message.Message):
    __slots__ = ("pregnancies", "glucose_mg_per_dl", "blood_pressure_mm_hg", "skin_thickness_mm", "insulin_mu_u_per_ml", "bmi_kg_per_m2", "pedigree", "age_years")
    PREGNANCIES_FIELD_NUMBER: _ClassVar[int]
    GLUCOSE_MG_PER_DL_FIELD_NUMBER: _ClassVar[int]
    BLOOD_PRESSURE_MM_HG_FIELD_NUMBER: _ClassVar[int]
    SKIN_THICKNESS_MM_FIELD_NUMBER: _ClassVar[int]
    INSULIN_MU_U_PER_ML_FIELD_NUMBER: _ClassVar[int]
    BMI_KG_PER_M2_FIELD_NUMBER: _ClassVar[int]
    PEDIGREE_FIELD_NUMBER: _ClassVar[int]
    AGE_YEARS_FIELD_NUMBER: _ClassVar[int]
    pregnancies: float
    glucose_mg_per_dl: float
    blood_pressure_mm_hg: float
    skin_thickness_mm: float
    insulin_mu_u_per_ml: float
    bmi_kg_per_m2: float
    pedigree: float
    age_years: float
    def __init__(self, pregnancies: _Optional[float] = ..., glucose_mg_per_dl: _Optional[float] = ..., blood_pressure_mm_hg: _Optional[float] = ..., skin_thickness_mm: _Optional[float] = ..., insulin_mu_u_per_ml: _Optional[float] = ..., bmi_kg_per_m2: _Optional[float] = ..., pedigree: _Optional[float] = ..., age_years: _Optional[float] = ...) -> None: ...

class AssessResponse(_message.Message):
    __slots__ = ("assessments",)
    ASSESSMENTS_FIELD_NUMBER: _ClassVar[int]
    assessments: _containers.RepeatedCompositeFieldContainer[Assessment]
    def __init__(self, assessments: _Optional[_Iterable[_Union[Assessment, _Mapping]]] = ...) -> None: ...

class Assessment(_message.Message):
    __slots__ = ("probability", "label")
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    probability: float
    label: str
    def __init__(self, probability: _Optional[float] = ..., label: _Optional[str] = ...) -> None: ...
