"""Diabetes among Pima women: eight measurements in physical units -> the probability of a positive test."""

from models.contract import Contract, Feature, Input, Output

CONTRACT = Contract(
    description="Estimates the probability of a positive diabetes test within five years from eight measurements.",
    intended_use="For teaching and benchmarking only, not for medical decisions.",
    warning="Trained on data from 768 Pima women collected decades ago.",
    input=Input(
        name="features",
        datatype="FP32",
        shape=(8,),
        features=(
            Feature(name="pregnancies", unit="count", minimum=0, maximum=30),
            Feature(
                name="glucose_mg_per_dl", unit="mg/dL, plasma, 2 h into an oral glucose tolerance test", minimum=0, maximum=1000
            ),
            Feature(name="blood_pressure_mm_hg", unit="mm Hg, diastolic", minimum=0, maximum=300),
            Feature(name="skin_thickness_mm", unit="mm, triceps fold", minimum=0, maximum=200),
            Feature(name="insulin_mu_u_per_ml", unit="µU/mL, serum, 2 h", minimum=0, maximum=2000),
            Feature(name="bmi_kg_per_m2", unit="kg/m²", minimum=0, maximum=150),
            Feature(name="pedigree", unit="diabetes pedigree function", minimum=0, maximum=5),
            Feature(name="age_years", unit="years", minimum=0, maximum=130),
        ),
        missing=True,
    ),
    output=Output(name="probabilities", datatype="FP32", shape=(2,)),
    labels=("negative", "positive"),
)
